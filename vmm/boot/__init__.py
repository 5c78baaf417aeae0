"""Boot loaders: an image and some options in, guest memory filled and an entry state out."""
