"""The world of the bundled model: emoji art with its names, in scenes with captions, and a judge."""
