"""`diskread completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that teaches a shell to complete diskread's commands and options.

    \b
    bash:  diskread completion bash > ~/.local/share/bash-completion/completions/diskread
    zsh:   diskread completion zsh > ~/.zfunc/_diskread      (with ~/.zfunc in fpath)
    fish:  diskread completion fish > ~/.config/fish/completions/diskread.fish
    """
    completion = get_completion_class(shell)
    assert completion is not None
    click.echo(completion(context.find_root().command, {}, "diskread", "_DISKREAD_COMPLETE").source())
