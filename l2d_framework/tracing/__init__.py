"""How an answer took shape: an observer, heat maps, and a page to play it back."""

from l2d_framework.tracing.files import check_trace_file, write_trace
from l2d_framework.tracing.page import write_page
from l2d_framework.tracing.plots import Maps, draw_trace, maps
from l2d_framework.tracing.record import Recorder, Trace

__all__ = ["Maps", "Recorder", "Trace", "check_trace_file", "draw_trace", "maps", "write_page", "write_trace"]
