"""Generation with thoughts for a model that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loaded.

Saved beside every thinking model. It reads the heads from where the model came from; `trl-quietstar` has the rest.
"""

from trl_quietstar.modeling import attach_saved_heads


def generate(inputs=None, generation_config=None, *, model, **kwargs):
    """As `QuietStarForCausalLM` generates: all its arguments, `think="never"` and `return_thoughts=True` among them."""
    thinking = attach_saved_heads(model)
    # of the class: on the object, Transformers has put this very function in its place
    return type(thinking).generate(thinking, inputs, generation_config, **kwargs)
