"""The view: one FUSE filesystem that stands in for parts of procfs and sysfs, with a subtree for each container.

``server.py`` is a process of its own (``python -m interceptor.view.server``) that outlives the daemon. What a container
sees is in the tables ``proc.py`` and ``sys.py``; what they leave to the kernel is read and written by the container's
*envoy* (``native/envoy.c``), a process in the container's namespaces with the container root's rights and no others.
"""
