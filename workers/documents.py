"""YAML as people write it, with whatever is wrong in it said in one line."""

from typing import Any

import yaml


class NotYaml(Exception):
    """The message begins with the place, as far as it is known: " line 3, column 7: not YAML: ..."."""


def read_yaml(text: str) -> Any:
    """The document. Raises NotYaml."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = getattr(error, "problem", None) or error
    except ValueError as error:  # a date that is none, and the like
        where, what = "", error
    except RecursionError:
        where, what = "", "nested too deep"
    raise NotYaml(f"{where} not YAML: {' '.join(str(what).split())}")
