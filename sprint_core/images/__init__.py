"""Images in and out: files, sizes, edges, colours of latents for previews."""
