"""Small trained models and the data they were trained on, for trying caching out."""
