"""The layer and the type in the name of a weight matrix."""

import re

LAYER = re.compile(r"((?:[^.]+\.)*?\d+)\.(.+)")


def layer_and_type(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.experts.17.up_proj.weight" -> ("layers.3", "mlp.experts.*.up_proj"); ("", name) outside."""
    name = name.removeprefix("model.").removesuffix(".weight")
    match = LAYER.fullmatch(name)
    if match is None:
        return "", name
    return match[1], ".".join("*" if part.isdigit() else part for part in match[2].split("."))
