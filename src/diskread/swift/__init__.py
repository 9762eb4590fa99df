"""OpenStack Swift's object server on diskread: a device that hangs holds up nobody but those who ask for it.

Swift loads it by entry points, chosen per storage policy in swift.conf:

    [storage-policy:0]
    diskfile_module = egg:diskread#replication.fs

or erasure_coding.fs for policies with erasure coding; or for one object server alone in its own configuration:

    [app:object-server]
    use = egg:diskread#object

Whatever touches a device runs on that device's slots then, with a deadline: 503 when it is missed, 507 at once while
the device is offline. `managers` has what Swift loads, `files`, `reading` and `writing` what becomes of its files,
`devices` the one disk of each device, `configuration` the settings, and `errors` what Swift's handlers get to see.

Made for Swift 2.38; `docs/swift.md` says how to bring it in, and what it does not cover.
"""
