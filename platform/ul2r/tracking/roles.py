"""Colors of the roles of runs."""

from __future__ import annotations

from collections.abc import Mapping

ROLE_COLORS: Mapping[str, str] = {"base": "#999999", "control": "#0072B2", "ul2r": "#D55E00"}
"""Line color by role; distinguishable without color vision (Okabe and Ito 2008)."""
