"""How many bytes of tensors are alive at most; the package counts with it as well."""

from __future__ import annotations

from vidaccel.autoencoders.live_bytes import LiveBytes as LiveBytes
