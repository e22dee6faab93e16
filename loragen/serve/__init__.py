"""`loragen serve`: adapters from prompts over HTTP.

`service` makes and keeps them, `app` speaks HTTP. `app` alone imports the extra `serve`.
"""
