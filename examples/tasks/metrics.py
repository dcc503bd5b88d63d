"""Metrics of the local tasks."""

import math


def bits_per_byte(document: dict, results: list[tuple[float, bool]]) -> dict[str, float]:
    """Of one document's worked solution; as a mean over documents it has a standard error and can be compared in pairs."""
    ((log_likelihood, _),) = results
    return {"bits_per_byte": -log_likelihood / (math.log(2) * len(document["answer"].encode()))}
