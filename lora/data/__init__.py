"""What is trained on: the procedural demo world, folders of videos and images, and caches of their encodings."""

from __future__ import annotations
