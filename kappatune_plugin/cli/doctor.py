"""What is installed beside this package, whether it fits, and what to install."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.markup import escape
from rich.table import Table

PACKAGE = "kappatune-plugin"
SHOWN = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
USES = {"trl": "kappatune sft, all trainers"}
# name of the package -> the versions that work, what it is for, what to type for it
INTEGRATIONS = {
    "axolotl": (">=0.17", "axolotl train x.yaml", "own environment, pip install axolotl"),
    "llamafactory": (
        ">=0.9.5,<0.10",
        "kappatune llamafactory",
        "own environment, pip install llamafactory",
    ),
    "deepspeed": (">=0.18.6", "ZeRO", f"pip install '{PACKAGE}[deepspeed]'"),
    "bitsandbytes": (">=0.45", "quantized bases", f"pip install '{PACKAGE}[quantized]'"),
    "lm_eval": (">=0.4.9", "tasks in forgetting", f"pip install '{PACKAGE}[lm_eval]'"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        name: of the package.
        found: its version; None if it isn't installed.
        wanted: the versions that work; "" for any.
        what: what it is for.
        cure: what to type if it is missing or doesn't fit.
    """

    name: str
    found: str | None
    wanted: str
    what: str
    cure: str

    @property
    def fits(self) -> bool:
        """Whether a version that works is installed."""
        return self.found is not None and SpecifierSet(self.wanted).contains(self.found, prereleases=True)


def findings() -> tuple[list[Finding], list[Finding]]:
    """The packages that this one needs, and those that it works with."""
    needed = [
        Finding(name, installed(name), wanted, USES.get(name, "all"), f"pip install '{name}{wanted}'")
        for name, wanted in _requirements()
        if name in SHOWN
    ]
    others = [Finding(name, installed(name), wanted, what, cure) for name, (wanted, what, cure) in INTEGRATIONS.items()]
    return needed, others


def installed(name: str) -> str | None:
    """The version of a package; None if it isn't installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements() -> Iterator[tuple[str, str]]:
    for line in requires(PACKAGE) or ():
        requirement = Requirement(line)
        if requirement.marker is None:
            yield requirement.name, str(requirement.specifier)


def examine() -> Table:
    """Everything as a table of one screen."""
    table = Table(title=f"{PACKAGE} {version(PACKAGE)}, Python {platform.python_version()}, {_device()}")
    for header in ("package", "found", "works", "for", "to do"):
        table.add_column(header)
    for group in findings():
        for finding in group:
            table.add_row(finding.name, finding.found or "-", finding.wanted or "any", finding.what, _to_do(finding))
        table.add_section()
    return table


def _to_do(finding: Finding) -> str:
    if finding.fits:
        return "[green]nothing[/green]"
    color = "red" if finding.found or finding.name in SHOWN else "yellow"
    return f"[{color}]{escape(finding.cure)}[/{color}]"


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "no PyTorch"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return "no GPU"
