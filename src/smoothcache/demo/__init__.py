"""Small trained models and the data they were trained on, for trying caching out.

One module a modality, each with a ``run_demo``; what they have in common is in `course`.
"""
