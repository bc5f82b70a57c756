from .files import RefCache as RefCache
from .files import RefCacheError as RefCacheError
