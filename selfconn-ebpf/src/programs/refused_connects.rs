//! The table of refused connection attempts from an address to itself, counted by network namespace, address
//! and port.

use aya_ebpf::{
    EbpfContext, Global,
    bindings::BPF_F_MMAPABLE,
    helpers::generated::bpf_ktime_get_boot_ns,
    macros::map,
    maps::{Array, HashMap, LruHashMap},
};
use aya_log_ebpf::warn;
use selfconn_ebpf::{
    Endpoint, Opener, Owner, PORT_SLOTS, counter, port_slot,
    refused_connects::{CGROUP_SHARE, OWNER_SHARE, RefusedConnectsReport, RefusedCount, USER_SHARE},
    tag,
};

use super::{
    counters::{add_one, count},
    kernel_read::KernelRead,
    owners, ring_buffer,
    sock::Sock,
};

/// A plain hash, not an LRU: user space removes an entry after a minute without attempts, and attempts that
/// do not fit are counted. The loader may set its size.
#[map]
static REFUSED_CONNECTS: HashMap<Endpoint, RefusedCount> = HashMap::with_max_entries(4_096, 0);

/// Maximum number of entries of [`REFUSED_CONNECTS`]. The loader sets it together with the size of the map.
#[unsafe(no_mangle)]
static REFUSED_SIZE: Global<u32> = Global::new(4_096);

/// When a connect was last refused at a port. User space reads it through mmap(2), and asks for an entry of
/// [`REFUSED_CONNECTS`] only where there may be one.
#[map]
static REFUSED_AT: Array<u64> = Array::with_max_entries(PORT_SLOTS, BPF_F_MMAPABLE);

/// The number of entries of each owner. An LRU: an owner that is evicted begins again at zero, until user space counts.
#[map]
static REFUSED_SHARES: LruHashMap<Owner, u64> = LruHashMap::with_max_entries(1_024, 0);

/// The initial value of a share. A static has an address of its own; a reference to a constant may be merged with a
/// global of the same value, and then the loader sets both.
static NO_ENTRIES: u64 = 0;

/// The initial value of an entry. It is in `.rodata`, because it would not fit on the stack.
static ZERO: RefusedCount = RefusedCount::ZERO;

/// Counts one refused attempt, and reports its destination to user space if a report is due.
#[inline(always)]
pub(crate) fn count_refused<C: EbpfContext, M: KernelRead>(
    ctx: &C,
    sock: Sock<M>,
    endpoint: &Endpoint,
    opener: &Opener,
) {
    count(counter::REFUSED);
    let destination = endpoint.any_family();
    let entry = REFUSED_CONNECTS.get_ptr_mut(&destination).or_else(|| {
        /// Do not overwrite an entry that another CPU has just inserted: `include/uapi/linux/bpf.h`.
        const BPF_NOEXIST: u64 = 1;
        if !take_share(&opener.owner) {
            return None;
        }
        let is_new = REFUSED_CONNECTS.insert(&destination, &ZERO, BPF_NOEXIST).is_ok();
        let entry = REFUSED_CONNECTS.get_ptr_mut(&destination);
        if let Some(entry) = entry
            && is_new
        {
            // SAFETY: the pointer is to a value of the map. No other CPU writes to this field.
            unsafe { (*entry).owner = opener.owner };
        }
        entry
    });
    let Some(refused) = entry else {
        count(counter::REFUSED_TABLE_FULL);
        // SAFETY: the pointer is to a value of the map.
        owners::count_loss(&opener.owner, |state| unsafe { &raw mut (*state).lost_refused_connects });
        warn!(ctx, "the refused connect table is full: one to port {} is not counted", destination.port);
        return;
    };
    // SAFETY: the pointer is to a value of the map. Its memory belongs to the map even if user space removes
    // the entry at the same time.
    unsafe { add_one(&raw mut (*refused).total) };
    // SAFETY: as above. The documentation of `RefusedCount` says which writes of another CPU can collide.
    let refused = unsafe { &mut *refused };
    // SAFETY: the helper takes no arguments.
    let now_ns = unsafe { bpf_ktime_get_boot_ns() };
    if let Some(at) = REFUSED_AT.get_ptr_mut(port_slot(&destination)) {
        // SAFETY: a slot of an array stays valid as long as the program is loaded. It is written whole.
        unsafe { at.write_volatile(now_ns) };
    }
    // The read is volatile, because the compiler does not know that the inline assembly has changed `total`.
    // SAFETY: the pointer comes from a live reference.
    let total = unsafe { core::ptr::read_volatile(&raw const refused.total) };
    refused.set_range(sock.own_port_range(), now_ns);
    if refused.record(total, now_ns, opener) {
        let report =
            || RefusedConnectsReport { tag: tag::REFUSED_CONNECTS, padding: 0, more_padding: 0, destination };
        if ring_buffer::submit(report) {
            refused.mark_reported();
        } else {
            refused.postpone_report(now_ns);
        }
    }
}

/// Takes an entry from the shares of the owner, of its user and of its control group. False: one of them is full.
#[inline(always)]
fn take_share(owner: &Owner) -> bool {
    take_one(owner, OWNER_SHARE)
        && owner.everywhere().is_none_or(|user| take_one(&user, USER_SHARE))
        && take_one(&owner.everybody(), CGROUP_SHARE)
}

#[inline(always)]
fn take_one(owner: &Owner, share: u32) -> bool {
    const BPF_NOEXIST: u64 = 1;
    let used = REFUSED_SHARES.get_ptr_mut(owner).or_else(|| {
        let _ = REFUSED_SHARES.insert(owner, &NO_ENTRIES, BPF_NOEXIST);
        REFUSED_SHARES.get_ptr_mut(owner)
    });
    let Some(used) = used else { return true };
    // SAFETY: the pointer is to a value of the map.
    let is_full = unsafe { used.read_volatile() } >= u64::from((REFUSED_SIZE.load() / share).max(1));
    if !is_full {
        // SAFETY: as above; it is aligned.
        unsafe { add_one(used) };
    }
    !is_full
}
