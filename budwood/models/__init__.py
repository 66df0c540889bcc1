"""Finding our way in any decoder of transformers: what a module is, is read from what it has and does."""
