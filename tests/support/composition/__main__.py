from .table import write

write()
