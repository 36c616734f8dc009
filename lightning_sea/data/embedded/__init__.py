"""Text and small models that come with the package, so that everything can be tried without a network.

``corpus/`` holds an excerpt of Wikipedia lead summaries in three splits (source and licence: ATTRIBUTION.md there);
``lm/`` and ``classifier/`` hold small dense models that share a vocabulary.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
_PREFIX = "embedded:"

CORPUS = _FOLDER / "corpus"
MODELS = ("classifier", "lm")


def resolve_model(name: str) -> str:
    """The folder of an embedded model ("embedded:lm", "embedded:classifier"); any other name as it is.

    Raises ValueError if the package has no such model.
    """
    if not name.startswith(_PREFIX):
        return name
    model = name.removeprefix(_PREFIX)
    if model not in MODELS:
        raise ValueError(f"no embedded model {name!r}; expected one of {', '.join(_PREFIX + m for m in MODELS)}")
    return str(_FOLDER / model)
