from .packed.model import load_packed as load_packed
from .version import __version__ as __version__
