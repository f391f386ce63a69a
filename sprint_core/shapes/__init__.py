"""The small world of plain shapes: scenes, captions, and a judge."""
