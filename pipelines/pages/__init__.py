"""Feature pages: a dictionary as static HTML that opens from a folder, without a server or a network."""

from pipelines.pages.write import write_pages

__all__ = ["write_pages"]
