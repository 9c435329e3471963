"""Floor 5: networks and weights of other projects. Nothing that is read here can execute code."""

from undiffuse.integrations.imported import Imported
from undiffuse.integrations.reading import import_weights

__all__ = ["Imported", "import_weights"]
