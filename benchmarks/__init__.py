"""Programs that measure; each prints a table and writes its rows as JSON (docs/performance.md, docs/results.md)."""

from coalora.allocator import keep_freed_memory
from coalora.process import set_variables

set_variables()  # as every command does, before torch is imported
keep_freed_memory()  # as every stage of a pipeline does
