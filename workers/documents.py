"""YAML as people write it, with whatever is wrong in it said in one line."""

from typing import Any

import yaml


class NotYaml(Exception):
    """The message begins with the place, as far as it is known: " line 3, column 7: not YAML: ..."."""


class _Loader(yaml.SafeLoader):
    """As YAML has it, a key stands once in a mapping; PyYAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Part of the interface."""
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is written twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The document. Raises NotYaml."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or error
    except ValueError as error:  # a date that is none, and the like
        where, what = "", error
    except RecursionError:
        where, what = "", "nested too deep"
    raise NotYaml(f"{where} not YAML: {' '.join(str(what).split())}")
