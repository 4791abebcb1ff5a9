"""What attention of a given width can represent and remember."""
