"""What the stages learn from: scenes of shapes, and captioned images."""
