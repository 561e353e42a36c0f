"""Patches, as pure functions of plain JSON values: nothing given is changed, nothing returned is shared with it."""
