"""The fastest preset within a budget, found by measuring: `vidaccel tune`; and from which length sparse pays here."""
