"""A preset measured lever by lever: `vidaccel waterfall`."""
