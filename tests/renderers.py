"""Marks of tests with the fixture `page` that need one of ComfyUI's two renderers."""

import pytest

CLASSIC, NODES2 = (pytest.mark.parametrize("page", [name], indirect=True) for name in ("classic", "nodes2"))
