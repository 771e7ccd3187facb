"""By what a resumed run knows that a model is the one it began with."""

from transformers import PreTrainedModel

from e3pruner.storage import fingerprint


def model_identity(model: PreTrainedModel) -> str:
    """A hash of the configuration and of each parameter's first values: all of a large model's would take minutes."""
    parameters = {name: p.detach().flatten()[:64] for name, p in model.named_parameters()}
    return fingerprint(model.config.to_dict(), parameters)
