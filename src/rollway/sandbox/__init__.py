"""Runs programs that nobody trusts, in the kernel's own isolation. Standard library only, and nothing else of rollway.

`client` is the caller's side. The other modules run inside: `box` is the process that enters new namespaces and forks
one child per program, `inside` is what that child does, `calls` how tests in one process call a program in another,
`values` the data that may pass between them, `seccomp` the system calls that are left, `kernel` those that it takes.
"""
