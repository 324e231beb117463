"""Small trained models and their training data, for trying out caching.

Each modality has a module with a ``run_demo``; shared code is in `course`.
"""
