"""Examples from local files: what calibrates, trains, scores and merges with data gets them here, in one form.

A :class:`DataSource` names a file or folder. Six formats are read: JSON Lines, plain text, folders of images, numpy
archives, parquet, and what ``datasets`` writes with ``save_to_disk``. Only :func:`download_data` downloads. Examples
come one at a time, in an order that a seed decides, and a part (train, validation, test) holds the same examples
whatever the order.
"""

from unmergeable.data.example import Example, class_number
from unmergeable.data.formats import FORMATS, Format
from unmergeable.data.hub import download_data
from unmergeable.data.records import Fields
from unmergeable.data.source import DataSource, Part

__all__ = ["FORMATS", "DataSource", "Example", "Fields", "Format", "Part", "class_number", "download_data"]
