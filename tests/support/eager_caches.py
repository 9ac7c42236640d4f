"""The caches that a preset can have, each skipping all that it may."""

from __future__ import annotations

from vidaccel.pipelines.presets import Cache

RATIOS = {"mag_ratios": [1.0] * 4, "retention_ratio": 0.0, "max_skip_steps": 3}
EAGER = {
    "forecast": Cache("forecast", 1e3, {"retention_steps": 0, "cache_end_steps": 0, "max_consecutive_cached": 0}),
    "first_block": Cache("first_block", 1e3),
    "magcache": Cache("magcache", 10.0, RATIOS),
    "seacache": Cache("seacache", 1e3, {"max_consecutive_cached": 0, "retention_steps": 0, "cache_end_steps": 0}),
    "taylorseer": Cache("taylorseer", 100, {"disable_cache_before_step": 1}),
    "cache_dit": Cache("cache_dit", 1e3, {"Fn_compute_blocks": 1, "max_warmup_steps": 1}),
}
