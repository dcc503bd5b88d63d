"""Muon for the hidden weights beside AdamW for the rest, and Grokfast's filter of their gradients, as one optimizer.

All three are others' work: `torch.optim.Muon`, `torch.optim.AdamW`, and `gradfilter_ema` of `pytorch-optimizer`. Here
stand only which parameter goes where, and what lets the Trainer schedule, step and save them as it does any optimizer.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from ..config import QuietStarConfig
from ..model.adapters import base_of
from .faults import listed


class CombinedOptimizer(torch.optim.Optimizer):
    """
    Several optimizers as one, over a gradient that Grokfast may filter first.

    The parameter groups of all stand in `param_groups` and their state in `state`, so that schedulers, Accelerate and
    checkpoints see one ordinary optimizer. The filter, `g + lambda * ema(g)` of [Grokfast: Accelerated Grokking by
    Amplifying Slow Gradients](https://huggingface.co/papers/2405.20233) (algorithm 1), acts within `step`: on the
    gradient of the whole batch, averaged over processes, unscaled and clipped. A step that is skipped leaves the
    averages alone, and so does a parameter without gradient.

    Args:
        optimizers (`list` of [`~torch.optim.Optimizer`]):
            Optimizers of different parameters that have not made a step yet.
        model ([`~torch.nn.Module`]):
            Holds those parameters; averages are saved under its names for them.
        grokfast_lambda (`float`, *optional*, defaults to `0.0`):
            Weight of the average; 0 is off.
        grokfast_alpha (`float`, *optional*, defaults to `0.98`):
            Decay of the average, per step.

    Raises:
        `ImportError`: if the filter is on and `pytorch-optimizer` is not installed.
    """

    state: defaultdict[Any, Any]  # of each parameter, and "grokfast": the average of each name

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        model: nn.Module,
        grokfast_lambda: float = 0.0,
        grokfast_alpha: float = 0.98,
    ):
        self.optimizers, self.model = optimizers, model
        self.grokfast_lambda, self.grokfast_alpha = grokfast_lambda, grokfast_alpha
        if grokfast_lambda:
            try:  # only here, since its import takes seconds
                from pytorch_optimizer.optimizer.grokfast import gradfilter_ema
            except ImportError as error:
                raise ImportError(
                    f"`grokfast_lambda={grokfast_lambda}` needs pytorch-optimizer; install it with "
                    "`pip install trl-quietstar[optimizers]`."
                ) from error
            self._filter = gradfilter_ema
        groups = [{**group, "optimizer": i} for i, one in enumerate(optimizers) for group in one.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        """One step of each optimizer on the filtered gradients, which are changed in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.grokfast_lambda:
            averages = self.state.get("grokfast")
            self.state["grokfast"] = self._filter(self.model, averages, self.grokfast_alpha, self.grokfast_lambda)
        for i, optimizer in enumerate(self.optimizers):
            optimizer.state = self.state  # anew at each step: loading replaces both
            optimizer.param_groups = [group for group in self.param_groups if group["optimizer"] == i]
            optimizer.step()
        return loss

    def load_state_dict(self, state_dict) -> None:
        """Loads the state as any optimizer does, and puts the averages on their parameters' devices."""
        super().load_state_dict(state_dict)
        if averages := self.state.get("grokfast"):
            devices = {name: parameter.device for name, parameter in self.model.named_parameters()}
            self.state["grokfast"] = {name: average.to(devices[name]) for name, average in averages.items()}


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """
    The trainable weights that Muon is for: matrices between hidden states.

    Every two-dimensional `weight` of a module other than an embedding, the LM head and the thinking heads, be the module
    linear, GPT-2's transposed `Conv1D`, a router, or a matrix of an adapter (LoRA's two are what is trained in place of
    a hidden weight). All else is AdamW's: embeddings and LM head, norms and biases, the thinking heads, the experts of a
    mixture where they are fused into one three-dimensional tensor, and matrices that multiply nothing (Mamba's `A_log`).

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A thinking model.

    Returns:
        `list[nn.Parameter]`: each once.
    """
    base = base_of(model)
    tables = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    others = [*tables, base.get_input_embeddings(), base.get_output_embeddings(), base.quietstar]
    excluded = {id(parameter) for module in others for parameter in module.parameters()}
    weights = {
        id(parameter): parameter
        for module in base.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.ndim == 2 and parameter.requires_grad and id(parameter) not in excluded
    }
    return list(weights.values())


def combine(optimizer: torch.optim.Optimizer, model: nn.Module, args: QuietStarConfig) -> torch.optim.Optimizer:
    """
    What `args` makes of the Trainer's own AdamW: with Muon it keeps all but the hidden weights; with neither Muon nor
    Grokfast it is returned as it came.

    Muon's update is scaled by 0.2 times the root of the matrix's longer side, as in [Muon is Scalable for LLM
    Training](https://huggingface.co/papers/2502.16982): the size of AdamW's, so that learning rate and weight decay mean
    what they mean there, and the same for a matrix that is stored transposed.

    Args:
        optimizer ([`~torch.optim.AdamW`]):
            Over all trainable parameters, before its first step. Its groups are changed in place.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model.
        args ([`QuietStarConfig`]):
            `muon_learning_rate`, `weight_decay`, `grokfast_lambda` and `grokfast_alpha`.

    Raises:
        `ImportError`: if a package is missing.
        `ValueError`: if Muon would have nothing to train.
    """
    if not args.combines_optimizers:
        return optimizer
    optimizers = [optimizer]
    if args.muon_learning_rate is not None:
        hidden = hidden_weights(model)
        if not hidden:
            raise ValueError(
                f"`muon_learning_rate={args.muon_learning_rate}` has no hidden weight to train: none that is trainable has "
                "two dimensions. Leave it out, or choose an adapter with matrices, as LoRA has."
            )
        ids = {id(parameter) for parameter in hidden}
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        muon = torch.optim.Muon(
            hidden, lr=args.muon_learning_rate, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        optimizers.append(muon)
    return CombinedOptimizer(optimizers, model, args.grokfast_lambda, args.grokfast_alpha)


def set_heads_apart(optimizer: torch.optim.Optimizer, heads: nn.Module, learning_rate: float) -> None:
    """
    Moves the parameters of the heads into parameter groups of their own, with the other options of the groups they were in.

    Args:
        optimizer ([`~torch.optim.Optimizer`]):
            Changed in place, before its first step.
        heads (`nn.Module`):
            The thinking heads.
        learning_rate (`float`):
            Of the new groups.
    """
    ids = {id(parameter) for parameter in heads.parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in ids]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            options = {name: value for name, value in group.items() if name != "params"}
            optimizer.add_param_group({**options, "params": own, "lr": learning_rate})


def hold_all(optimizers: tuple, model: nn.Module, heads_learning_rate: float) -> None:
    """
    Sees to it that an optimizer of the user's holds all that is trained. Heads that were not there when it was made become a
    group of their own.

    Args:
        optimizers (`tuple`):
            The user's optimizer, if any, which is changed in place; and the scheduler, if any, that was made for its groups, to
            which then none can be added.
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The thinking model.
        heads_learning_rate (`float`):
            Of the heads' group.

    Raises:
        `ValueError`: if parameters that are trained are in none of its groups, or a scheduler comes without its optimizer.
    """
    optimizer, scheduler = optimizers
    if optimizer is None:
        if scheduler is not None:  # its rates would be logged, and others trained with
            raise ValueError(
                "`optimizers` has a scheduler without its optimizer; give both, or set `lr_scheduler_type` and "
                "`lr_scheduler_kwargs`."
            )
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in held}
    heads = [name for name in missing if "quietstar." in name] if scheduler is None else []
    if heads:
        optimizer.add_param_group({"params": [missing.pop(name) for name in heads], "lr": heads_learning_rate})
    if missing:
        raise ValueError(
            f"The optimizer in `optimizers` has {len(missing)} parameters that are to be trained in none of its groups: "
            f"{listed([*missing])}. Load the model by `QuietStarForCausalLM.from_pretrained`, put the adapter on, make "
            "optimizer and scheduler over its parameters and pass the model itself; or leave out `optimizers` and set `optim`."
        )


def check_optimizers(args: QuietStarConfig, optimizers: tuple, sharded: bool) -> None:
    """
    Refuses Muon and Grokfast where they would be ignored or are not known to be right.

    Args:
        args ([`QuietStarConfig`]):
            Configuration.
        optimizers (`tuple`):
            Optimizer and scheduler that the user passed.
        sharded (`bool`):
            Whether FSDP or DeepSpeed splits parameters over processes.

    Raises:
        `ValueError`: if an optimizer was passed, or parameters are sharded.
    """
    given = f"`muon_learning_rate` ({args.muon_learning_rate}) and `grokfast_lambda` ({args.grokfast_lambda})"
    if args.combines_optimizers and optimizers[0] is not None:
        raise ValueError(
            f"{given} would be ignored, because you passed an optimizer; leave out either those or `optimizers`."
        )
    if args.combines_optimizers and sharded:
        raise ValueError(
            f"{given} do not work with FSDP or DeepSpeed: Muon needs whole matrices, and Grokfast the gradients ahead of "
            "the step. Train with DDP or on one device, or leave them out."
        )
