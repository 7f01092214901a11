"""The page: captions in, rows while they are drawn, the ranked images out. `dalle1 web` shows it.

Pictures travel inside the page's own messages, in both directions, as data URLs. So nothing that a
visitor sends or gets is ever a file of the server's, and no address of the page reads one.
"""
