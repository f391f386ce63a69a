"""The small world of plain shapes that the bundled model knows: scenes, captions, and a judge."""
