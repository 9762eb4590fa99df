"""The subcommands of ``diskread``: one module with one click command each."""
