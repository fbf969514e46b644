# SPDX-License-Identifier: GPL-2.0-or-later
#
# A reader of thinvm images that shares nothing with the driver: written from
# docs/interop/thinvm.rst, so that a bug in the driver or a gap in the document
# shows as a difference between the two.  scripts/thinvm-image.py is its
# command line; tests use both as an oracle.
#
#   structures   one structure each, judged as it is decoded
#   journal      which records count, and their operations
#   pages        a base: pages, extents, snapshots, counts
#   replay       what operations do to it
#   image        base and journal, and what the disk reads as
#   check        recounts everything
#   explain      all structures as data, also of a damaged image
#
# Nothing from an image is believed before its checksum, type and bounds were
# looked at; whatever is wrong raises FormatError with the place and the value.
# Loops are bounded by pages and records that exist in the file.  Only Python's
# standard library.

from .check import check
from .explain import explain
from .image import Image, RawImage
from .structures import FormatError

__all__ = ['FormatError', 'Image', 'RawImage', 'check', 'explain']
