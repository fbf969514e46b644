# SPDX-License-Identifier: GPL-2.0-or-later
"""How a function becomes a functional test.

    @test(seconds=120, formats=('thinvm', 'qcow2'))
    def writes_survive(ctx): ...

The function gets a Context; it returns if all is well and raises Failure
(or anything else) if not, Skip if it cannot run here.
"""

ANY = ('thinvm', 'qcow2', 'raw')
THIN = ('thinvm', 'qcow2')
OURS = ('thinvm',)


def test(seconds=240, formats=OURS, slow=False):
    """Mark a test: time limit, formats it makes sense for, only with --all."""
    def mark(func):
        func.functional_test = {'seconds': seconds, 'formats': formats,
                                'slow': slow}
        return func
    return mark
