"""The examples, converted, load in the toolkit's own parser: `python parse_examples.py TOOLKIT MODEL FOLDER`

TOOLKIT is axolotl or llamafactory; MODEL a folder that takes the place of each example's model. To be run in the
toolkit's environment; the copies are written to FOLDER.
"""

import sys
from pathlib import Path

import yaml

from kappatune_plugin.toolkits.convert import convert_recipe
from kappatune_plugin.toolkits.lora_recipes import TOOLKITS

EXAMPLES = Path(__file__).parent / "examples"


def parse_axolotl(path: Path) -> dict:
    """What the block says after Axolotl's own validation."""
    from axolotl.cli.config import load_cfg

    config = load_cfg(str(path))
    assert config.adapter == "kappatune"
    return dict(config.kappatune)


def parse_llamafactory(path: Path) -> dict:
    """What the keys say after LLaMA-Factory's own validation."""
    from kappatune_plugin.toolkits.llamafactory import install

    install()
    from llamafactory.hparams import get_train_args

    # the files are written for a GPU
    settings = {**yaml.safe_load(path.read_text(encoding="utf-8")), "bf16": False}
    _, _, _, finetuning, _ = get_train_args(settings)
    return finetuning.kappatune


def main(toolkit: str, model: str, folder: Path) -> None:
    parse = {"axolotl": parse_axolotl, "llamafactory": parse_llamafactory}[toolkit]
    for example in sorted((EXAMPLES / toolkit).glob("*.yaml")):
        text = example.read_text(encoding="utf-8")
        path = folder / f"example-{example.name}"
        path.write_text(text.replace(yaml.safe_load(text)[TOOLKITS[toolkit].model], model, 1), encoding="utf-8")
        converted = convert_recipe(path)
        new = converted.write(folder / f"converted-{example.name}")
        found = parse(new)
        assert found["k"] == converted.budget, (found, converted.budget)
        print(f"{example.name}: {toolkit} reads it, k = {converted.budget}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
