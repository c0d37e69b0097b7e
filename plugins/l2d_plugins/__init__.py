"""The built-in components, found through entry points like any third party's."""
