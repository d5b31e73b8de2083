"""README's table of versions, made from what the toolkits' scripts recorded: `python tests/toolkits/matrix.py`."""

import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- made by tests/toolkits/matrix.py -->", "<!-- end -->"
COLUMNS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")
TOOLKITS = ("axolotl", "llamafactory")


def table(results: list[dict]) -> str:
    """The runs as a Markdown table, and below it what ran in each."""
    if not results:
        return "No run is recorded yet."
    header = ["`run.sh`", "Python", *COLUMNS, "toolkit", "tests"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for result in results:
        versions = result["versions"]
        toolkit = next((f"{name} {versions[name]}" for name in TOOLKITS if name in versions), "")
        tests = f"{result['tests']['passed']} passed" if result["tests"] else ""
        cells = [result["name"], result["python"], *(versions.get(name, "") for name in COLUMNS), toolkit, tests]
        lines.append(f"| {' | '.join(cells)} |")
    ran = {result["ran"] for result in results}
    return "\n".join([*lines, "", *(f"- {each}" for each in sorted(ran))])


def load(folder: Path = HERE / "results") -> list[dict]:
    """What was recorded, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def updated(text: str, results: list[dict]) -> str:
    """README with the table of `results` between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8"), load()), encoding="utf-8")
