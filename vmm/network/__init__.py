"""What a network card's link leads to on this host: a user-mode stack, another machine, a tap."""
