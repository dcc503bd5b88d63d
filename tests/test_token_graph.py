"""A token of all branches in one launch: the same thoughts, whatever replays the forward; on a GPU a CUDA graph does."""

import contextlib
import gc
import os
import threading
import types
import weakref

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from trl_quietstar.branches import cuda_graph
from trl_quietstar.branches.replay import Replay
from trl_quietstar.branches.shared_prefix import SharedPrefix
from trl_quietstar.thinking import writing
from trl_quietstar.thinking.check import TOLERANCES, path_difference
from trl_quietstar.thinking.sampling import ThoughtSampler

from .conformance import tiny_model as family_model
from .tiny import FAMILIES, Casts, exact_model, generators, mixed_text, positions_of, sampling, think, tiny_model


DEVICE = torch.device(os.environ.get("QUIETSTAR_TEST_DEVICE", "cpu"), 0)
IS_GPU = DEVICE.type == "cuda"
LENGTH = 12


class Again:
    """Stands in for a CUDA graph where there is none: it runs what was recorded."""

    def __init__(self, function):
        self.replay = function


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The functions that are recorded."""
    known: list = []
    record = cuda_graph.record if IS_GPU else lambda function, device: Again(function)

    def noted(function, device):
        graph = record(function, device)
        known.append(function)
        return graph

    monkeypatch.setattr(cuda_graph, "record", noted)
    if not IS_GPU:
        monkeypatch.setattr(cuda_graph, "can_record", lambda device: True)
        monkeypatch.setattr(cuda_graph, "refused_waits", contextlib.nullcontext)
        monkeypatch.setattr(writing, "JOINED_TEXT", 0)  # branches of their own, as on a GPU
    return known


DRAWS: dict[str, dict] = {
    "whole": {"stop": None},
    "early ends": {"stop": lambda token_ids: token_ids[:, -1] % 4 == 0},
    "greedy": {"stop": None, "do_sample": False},
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_those_of_replay(name, draw, recorded):
    """Token for token, in float64."""
    model, text = exact_model(name).to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(**{**dict(num_thoughts=3, thought_length=LENGTH), **DRAWS[draw]})
    expected = think(model, text, Replay(), positions_of(text, 3), settings)
    assert not recorded
    found = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
    assert recorded
    assert torch.equal(found.mask, expected.mask)
    assert torch.equal(found.token_ids * found.mask, expected.token_ids * expected.mask)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma4_text", "deepseek_v3", "starcoder2"])
def test_families_with_attention_of_their_own(name, recorded, monkeypatch):
    """Windows by layer, keys and values of different sizes: the same tokens as without recording."""
    model, text = family_model(name).to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=LENGTH, stop=None)
    found = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
    assert recorded
    monkeypatch.setattr(cuda_graph, "can_record", lambda device: False)
    expected = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
    assert torch.equal(found.token_ids, expected.token_ids)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_token_casts_no_weights(name, recorded, monkeypatch):
    """Under autocast linear layers have copies of their own, which give the same thoughts, and their parameters afterwards."""
    model, text = family_model(name).to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=LENGTH, stop=None)
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    layers = [x for x in model.get_decoder().modules() if type(x) in (torch.nn.Linear, Conv1D)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        with Casts() as casts:
            found = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
        monkeypatch.setattr(cuda_graph, "can_record", lambda device: False)
        expected = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
    assert recorded and torch.equal(found.token_ids, expected.token_ids)
    for name, parameter in model.named_parameters():
        assert before[name][0] == id(parameter) and torch.equal(before[name][1], parameter), name
    shape = layers[0].weight.shape  # cast once for the text by autocast, and once for the graph
    assert casts.shapes.count(shape) == 2 * sum(layer.weight.shape == shape for layer in layers)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_room_is_made_as_it_is_needed(name, recorded, monkeypatch):
    """Each token attends to all slots that there is room for, so a long thought begins with little."""
    model, text = exact_model(name).to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=30, stop=None)
    expected = think(model, text, Replay(), positions_of(text, 2), settings)
    rooms, prepare = [], cuda_graph.TokenGraph.__init__

    def noted(graph, *args):
        prepare(graph, *args)
        rooms.append(graph.room)

    monkeypatch.setattr(cuda_graph, "FIRST_ROOM", 4)
    monkeypatch.setattr(cuda_graph.TokenGraph, "__init__", noted)
    found = think(model, text, SharedPrefix(), positions_of(text, 2), settings)
    assert rooms == [4, 8, 16, 31] and len(recorded) == 4
    assert torch.equal(found.token_ids, expected.token_ids)


def test_groups_have_graphs_of_their_own(recorded):
    """A group begins with the text alone."""
    model, text = exact_model().to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=LENGTH, stop=None)
    expected = ThoughtSampler(settings, generators(text, step=1), 4).sample(model, text, Replay())
    found = ThoughtSampler(settings, generators(text, step=1), 4).sample(model, text, SharedPrefix(), batch_size=4)
    assert len(recorded) == 2
    assert torch.equal(found.token_ids, expected.token_ids)


def test_other_threads_and_modes_are_left_alone(recorded):
    """What is refused while a token is recorded is refused in the whole process."""
    model, text = exact_model().to(DEVICE), mixed_text().to(DEVICE)
    settings, found = sampling(num_thoughts=2, thought_length=LENGTH, stop=None), []

    def sample():
        found.append(think(model, text, SharedPrefix(), positions_of(text, 3), settings))

    thread = threading.Thread(target=sample)
    thread.start()
    thread.join()
    with torch.inference_mode():
        sample()
    assert len(found) == 2 and not recorded


def test_a_batch_without_memory_is_run_as_it_is(recorded, monkeypatch):
    """And the next one is recorded."""
    model, text = exact_model().to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=LENGTH, stop=None)
    expected = think(model, text, Replay(), positions_of(text, 3), settings)

    def full(function, device):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cuda_graph, "record", full)
        assert torch.equal(
            think(model, text, SharedPrefix(), positions_of(text, 3), settings).token_ids, expected.token_ids
        )
    assert torch.equal(
        think(model, text, SharedPrefix(), positions_of(text, 3), settings).token_ids, expected.token_ids
    )
    assert len(recorded) == 1


def test_a_model_that_waits_is_run_as_it_is(recorded, monkeypatch, caplog):
    """And says so once; its thoughts are the same."""
    model, text = exact_model().to(DEVICE), mixed_text().to(DEVICE)
    settings = sampling(num_thoughts=2, thought_length=LENGTH, stop=None)
    expected = think(model, text, SharedPrefix(), positions_of(text, 3), settings)
    assert len(recorded) == 1

    waiting, refused = exact_model().to(DEVICE), []

    @contextlib.contextmanager
    def refused_waits():
        refused.append(True)
        try:
            yield
        finally:
            refused.clear()

    def wait(module, args, output):
        output.sum().item()
        if refused:
            raise RuntimeError("called a synchronizing CUDA operation")

    waiting.model.norm.register_forward_hook(wait)
    if not IS_GPU:
        monkeypatch.setattr(cuda_graph, "refused_waits", refused_waits)
    for _ in range(2):
        found = think(waiting, text, SharedPrefix(), positions_of(text, 3), settings)
        assert torch.equal(found.token_ids, expected.token_ids)
    assert len(recorded) == 1
    assert caplog.text.count("cannot be launched as one CUDA graph") == 1


def test_what_a_graph_holds_is_given_back_at_once(monkeypatch):
    """Not by Python's garbage collection, whose time nobody knows: the branches' keys and values are large."""
    made: list = []

    def noted(function, device):
        held = (cell.cell_contents for cell in function.__closure__)
        made.append(weakref.ref(next(x for x in held if isinstance(x, cuda_graph.TokenGraph))))
        return types.SimpleNamespace(replay=lambda: None)  # a real graph does not hold the function either

    monkeypatch.setattr(cuda_graph, "record", noted)
    model, text = exact_model().to(DEVICE), mixed_text().to(DEVICE)
    gc.collect()
    gc.disable()
    try:
        think(model, text, SharedPrefix(), positions_of(text, 3), sampling(thought_length=LENGTH, stop=None))
        assert made and all(graph() is None for graph in made)
    finally:
        gc.enable()


def test_the_start_up_check_goes_by_recorded_tokens(recorded, monkeypatch):
    """And sees one that writes to the wrong slot."""
    model = tiny_model("llama").to(DEVICE)
    assert path_difference(model, SharedPrefix()) <= TOLERANCES[torch.float32]
    assert recorded
    forward = cuda_graph.TokenGraph._forward

    def late(graph, cache):
        graph.slot.add_(1)
        forward(graph, cache)
        graph.slot.sub_(1)

    monkeypatch.setattr(cuda_graph.TokenGraph, "_forward", late)
    assert path_difference(model, SharedPrefix()) > 10 * TOLERANCES[torch.float32]


@pytest.mark.skipif(not IS_GPU, reason="QUIETSTAR_TEST_DEVICE=cuda is needed")
def test_a_recording_that_fails_says_why():
    """The first error, not that there was one; and the device goes on."""

    def runs_out():
        torch.zeros(8, device=DEVICE).add_(1)
        raise RuntimeError("no memory is left")

    with pytest.raises(RuntimeError, match="no memory is left"):
        cuda_graph.record(runs_out, DEVICE)
    assert torch.zeros(8, device=DEVICE).add_(1).sum().item() == 8
