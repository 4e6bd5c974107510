"""Views of a plan, a report or an inspection: text, JSON, Markdown, HTML.

Everything a person sees is in the JSON, so a view is made from plain dictionaries alone: this package
knows nothing of torch, of models or of sites.
"""
