"""Remove and add top-level keys of a YAML file; every other byte, comments too, stays as it was.

A round trip through a YAML library keeps most comments, but loses those below a deleted key, and wraps and indents
lines anew. Here the parser is only asked which lines a key takes.
"""

import yaml

from kappatune_plugin.errors import KappaTuneError


class YamlText:
    """The text of a YAML file whose top level is a mapping in block style.

    Attributes:
        keys: key -> (its first line, its last line), both counted from 0.

    Raises:
        KappaTuneError: the top level is written in braces.
    """

    def __init__(self, text: str) -> None:
        self.lines = text.splitlines(keepends=True)
        self.newline = "\r\n" if self.lines and self.lines[0].endswith("\r\n") else "\n"
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode) or root.flow_style:
            raise KappaTuneError("The recipe isn't a list of `key: value` lines: write one key on each line.")
        self._nodes = {key.value: value for key, value in root.value}
        self.keys = {key.value: (key.start_mark.line, self._last_line(key, value)) for key, value in root.value}
        self._new: dict[int, list[str]] = {}
        self._gone: set[int] = set()

    def _last_line(self, key: yaml.Node, value: yaml.Node) -> int:
        first, last = key.start_mark.line, _end(value)
        while last > first and not self.lines[last].strip():
            # blank lines after a multi-line string separate it from what follows
            last -= 1
        return max(first, last)

    def remove(self, key: str) -> None:
        """Remove `key` and its value, with the comments on their lines."""
        first, last = self.keys[key]
        self._gone.update(range(first, last + 1))

    def insert(self, line: int, lines: list[str]) -> None:
        """Insert `lines`, which have no line ends, before `line`."""
        self._new.setdefault(line, []).extend(lines)

    def set(self, key: str, value: str) -> None:
        """Replace the value of `key`; a comment on its line stays."""
        first, last = self.keys[key]
        node = self._nodes[key]
        comment = ""
        if isinstance(node, yaml.ScalarNode) and first == last:
            comment = self.lines[last].rstrip("\r\n")[node.end_mark.column :].strip()
        self.remove(key)
        self.insert(first, [f"{key}: {value}" + (f"  {comment}" if comment else "")])

    def append(self, key: str, item: str) -> None:
        """Add `item` to the list that `key` holds."""
        node = self._nodes[key]
        if not isinstance(node, yaml.SequenceNode) or node.flow_style or not node.value:
            values = [each.value for each in node.value] if isinstance(node, yaml.SequenceNode) else []
            self.set(key, f"[{', '.join([*values, item])}]")
            return
        indent = self.lines[node.value[-1].start_mark.line].partition("-")[0]
        self.insert(self.keys[key][1] + 1, [f"{indent}- {item}"])

    def text(self) -> str:
        """The text with all changes."""
        written: list[str] = []
        for number, line in enumerate([*self.lines, ""]):
            for new in self._new.get(number, []):
                if written and not written[-1].endswith(("\n", "\r")):
                    written[-1] += self.newline
                written.append(new + self.newline)
            if number not in self._gone:
                written.append(line)
        return "".join(written)


def _end(node: yaml.Node) -> int:
    """The last line of a value; the parser's end of a block is where the next key begins, after comments."""
    if isinstance(node, yaml.MappingNode | yaml.SequenceNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return max(node.start_mark.line, _end(last[1] if isinstance(last, tuple) else last))
    mark = node.end_mark
    return mark.line - 1 if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">") else mark.line
