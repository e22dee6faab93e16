"""Know: does the generated adapter beat the alternatives, on any datasets?"""
