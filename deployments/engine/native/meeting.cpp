// Collectives in a segment that all ranks of a machine have mapped.
//
// The work goes in rounds. In a round a rank writes what others need into its own slot, posts the round's number, and reads the
// slots of those whose number has come as far. Each rank has two slots, for even and odd rounds, so one wait a round is enough:
//
//   * Data is there: the writer's post (release) comes after its writes, the reader's look at it (acquire) before its reads.
//   * Data is still there: a rank posts round k only after it has read everything of round k-1. Who wants to write in round k, over
//     what others read in round k-2, first sees that all have posted k-1. That is nearly always so already.
//
// Numbers wrap after 2^32 rounds; ranks are never more than two apart, so the sign of a difference tells who is ahead.
//
// A rank that waits spins for some microseconds, offers its core to others a few times, then sleeps on a futex: a machine may have
// no core to spare. If the one it waits for was last on the same core, spinning would only keep it from coming. Who sleeps counts
// itself in `sleepers` before it looks for the last time, and the poster posts before it looks at `sleepers` (both sequentially
// consistent), so one of them always sees the other. The kernel compares the number once more.
//
// A rank's life is a lock on its own byte of the segment. The kernel releases it when the process ends, however it ends.

#include "meeting.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <ctime>

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr size_t LINE = 128;        // two cache lines: processors fetch them in pairs
constexpr int64_t CHUNK = 1 << 18;  // bytes of a slot: stays in the second-level cache between writer and reader
constexpr int64_t BLOCK = 512;      // numbers summed at a time, in the first-level cache
constexpr int64_t SHARE_FROM = 1 << 15;  // numbers from which three ranks and more don't all sum everything; measured
constexpr int MAX_RANKS = 64;
constexpr int64_t SPIN_NS = 40'000;
constexpr int YIELDS = 8;
constexpr int64_t LOOK_NS = 100'000'000;  // a sleeper looks this often whether the rank it waits for lives

struct alignas(LINE) Seat {
    std::atomic<uint32_t> posted;    // the last round that this rank has begun; only it writes here
    std::atomic<uint32_t> sleepers;  // ranks that wait for `posted` in the kernel
    std::atomic<uint32_t> taken;
    std::atomic<int> core;  // where the rank was when it posted
};

struct alignas(LINE) Board {
    std::atomic<uint32_t> size;
    std::atomic<uint32_t> over;  // 0, or MeetingResult | missing rank << 8
};

static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4, "a futex is 32 bits");

struct Meeting {
    Board* board;
    Seat* seats;
    char* slots;
    size_t bytes;
    int fd, rank, size;
    uint32_t round;
    int64_t spin_ns;

    Seat& mine() const { return seats[rank]; }
    char* slot(int of) const { return slots + (2 * of + (round & 1)) * CHUNK; }
};

int64_t now_ns() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t ns) {
    timespec time{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &time, nullptr, 0);  // whatever ends it, the caller looks again
}

void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

// Starts when it is first asked, so that a call that never sleeps never asks the clock for it.
class Deadline {
  public:
    explicit Deadline(double timeout_s) : timeout_ns_(static_cast<int64_t>(std::clamp(timeout_s, 0.0, 1e9) * 1e9)) {}

    int64_t left_ns() {
        int64_t now = now_ns();
        if (!end_) end_ = now + timeout_ns_;
        return end_ - now;
    }

  private:
    int64_t timeout_ns_, end_ = 0;
};

bool reached(const Seat& seat, uint32_t round) {
    return static_cast<int32_t>(seat.posted.load(std::memory_order_acquire) - round) >= 0;
}

struct flock byte_of(int rank, short type) {
    struct flock range {};
    range.l_type = type;
    range.l_whence = SEEK_SET;
    range.l_start = rank;
    range.l_len = 1;
    return range;
}

bool alive(const Meeting& meeting, int rank) {
    if (!meeting.seats[rank].taken.load()) return true;  // hasn't come yet
    struct flock range = byte_of(rank, F_WRLCK);
    return fcntl(meeting.fd, F_GETLK, &range) != 0 || range.l_type != F_UNLCK;
}

int result(const Meeting& meeting) { return static_cast<int>(meeting.board->over.load() & 0xff); }

// The first reason stays. Sleepers wake up and find it; one that is just falling asleep finds it after LOOK_NS.
int end_meeting(Meeting& meeting, MeetingResult why, int missing) {
    uint32_t none = 0;
    meeting.board->over.compare_exchange_strong(none, static_cast<uint32_t>(why) | static_cast<uint32_t>(missing) << 8);
    for (int rank = 0; rank < meeting.size; ++rank) futex_wake(meeting.seats[rank].posted);
    return result(meeting);
}

bool spin(const Meeting& meeting, const Seat& seat, uint32_t round) {
    if (meeting.spin_ns && seat.core.load(std::memory_order_relaxed) != sched_getcpu()) {
        for (int64_t end = now_ns() + meeting.spin_ns; now_ns() < end;)
            for (int i = 0; i < 16; ++i) {
                if (reached(seat, round)) return true;
                relax();
            }
    }
    for (int i = 0; i < YIELDS; ++i) {
        if (reached(seat, round)) return true;
        sched_yield();
    }
    return reached(seat, round);
}

int sleep_until(Meeting& meeting, int rank, uint32_t round, Deadline& deadline) {
    Seat& seat = meeting.seats[rank];
    while (!reached(seat, round)) {
        if (int over = result(meeting)) return over;
        int64_t left = deadline.left_ns();
        if (left <= 0) return end_meeting(meeting, MEETING_LATE, rank);
        seat.sleepers.fetch_add(1);
        uint32_t seen = seat.posted.load();
        if (static_cast<int32_t>(seen - round) < 0) futex_wait(seat.posted, seen, std::min(left, LOOK_NS));
        seat.sleepers.fetch_sub(1);
        // What a rank posted before it ended is valid: look at its life first and at its number afterwards.
        if (!reached(seat, round) && !alive(meeting, rank) && !reached(seat, round)) return end_meeting(meeting, MEETING_LOST, rank);
    }
    return MEETING_OK;
}

// Until `rank` has posted `round`.
int await(Meeting& meeting, int rank, uint32_t round, Deadline& deadline) {
    const Seat& seat = meeting.seats[rank];
    if (reached(seat, round) || spin(meeting, seat, round)) return MEETING_OK;
    return sleep_until(meeting, rank, round, deadline);
}

int await_others(Meeting& meeting, uint32_t round, Deadline& deadline) {
    for (int rank = 0; rank < meeting.size; ++rank)
        if (rank != meeting.rank)
            if (int failure = await(meeting, rank, round, deadline)) return failure;
    return MEETING_OK;
}

// The next round of a rank that writes: its slot may be used once everybody has left the round before the last.
int begin_writing(Meeting& meeting, Deadline& deadline) {
    ++meeting.round;
    return await_others(meeting, meeting.round - 1, deadline);
}

void post(Meeting& meeting) {
    meeting.mine().core.store(sched_getcpu(), std::memory_order_relaxed);
    meeting.mine().posted.store(meeting.round);
    if (meeting.mine().sleepers.load()) futex_wake(meeting.mine().posted);
}

// The next round of a rank that only reads, or the second half of one that has written.
int post_and_await(Meeting& meeting, Deadline& deadline) {
    post(meeting);
    return await_others(meeting, meeting.round, deadline);
}

struct BFloat16 {
    uint16_t bits;

    operator float() const {
        uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }

    static BFloat16 of(float value) {  // to the nearest, ties to even; what isn't a number stays none
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        uint32_t rounded = (wide + 0x7fff + (wide >> 16 & 1)) >> 16;
        return {static_cast<uint16_t>(value == value ? rounded : (wide >> 16 | 0x40))};
    }
};

inline void put(float& target, float value) { target = value; }
inline void put(BFloat16& target, float value) { target = BFloat16::of(value); }

template <typename Number>
const Number* numbers(const Meeting& meeting, int rank, int64_t first) {
    return reinterpret_cast<const Number*>(meeting.slot(rank)) + first;
}

// Numbers `first` to `last` of all slots, summed in the order of ranks.
template <typename Number>
void sum(const Meeting& meeting, int64_t first, int64_t last, Number* __restrict target) {
    float sums[BLOCK];
    for (int64_t start = first; start < last; start += BLOCK) {
        const int64_t count = std::min(BLOCK, last - start);
        const Number* __restrict a = numbers<Number>(meeting, 0, start);
        const Number* __restrict b = numbers<Number>(meeting, 1, start);
        for (int64_t i = 0; i < count; ++i) sums[i] = static_cast<float>(a[i]) + static_cast<float>(b[i]);
        for (int rank = 2; rank < meeting.size; ++rank) {
            const Number* __restrict more = numbers<Number>(meeting, rank, start);
            for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<float>(more[i]);
        }
        for (int64_t i = 0; i < count; ++i) put(target[start - first + i], sums[i]);
    }
}

// Every rank sums everything.
template <typename Number>
int reduce_direct(Meeting& meeting, Number* data, int64_t count, Deadline& deadline) {
    if (int failure = begin_writing(meeting, deadline)) return failure;
    std::memcpy(meeting.slot(meeting.rank), data, count * sizeof(Number));
    if (int failure = post_and_await(meeting, deadline)) return failure;
    sum(meeting, 0, count, data);
    return MEETING_OK;
}

// Every rank sums its share, and in a second round takes the others' shares.
template <typename Number>
int reduce_shared(Meeting& meeting, Number* data, int64_t count, Deadline& deadline) {
    const int64_t share = (count + meeting.size - 1) / meeting.size;
    auto first = [&](int rank) { return std::min(rank * share, count); };
    const int64_t begin = first(meeting.rank), end = first(meeting.rank + 1);
    if (int failure = begin_writing(meeting, deadline)) return failure;
    std::memcpy(meeting.slot(meeting.rank), data, count * sizeof(Number));
    if (int failure = post_and_await(meeting, deadline)) return failure;
    sum(meeting, begin, end, data + begin);
    if (int failure = begin_writing(meeting, deadline)) return failure;
    std::memcpy(meeting.slot(meeting.rank), data + begin, (end - begin) * sizeof(Number));
    if (int failure = post_and_await(meeting, deadline)) return failure;
    for (int rank = 0; rank < meeting.size; ++rank)
        if (rank != meeting.rank)
            std::memcpy(data + first(rank), meeting.slot(rank), (first(rank + 1) - first(rank)) * sizeof(Number));
    return MEETING_OK;
}

template <typename Number>
int all_reduce(Meeting& meeting, Number* data, int64_t count, double timeout_s) {
    if (int over = result(meeting)) return over;
    Deadline deadline(timeout_s);
    const int64_t most = CHUNK / static_cast<int64_t>(sizeof(Number));
    for (int64_t start = 0; start < count; start += most) {
        const int64_t some = std::min(most, count - start);
        auto reduce = meeting.size > 2 && some >= SHARE_FROM ? reduce_shared<Number> : reduce_direct<Number>;
        if (int failure = reduce(meeting, data + start, some, deadline)) return failure;
    }
    return MEETING_OK;
}

// Numbers `start` to `start + count` of one rank's part, to where they belong in the whole.
void place(float* out, const float* numbers, int64_t start, int64_t count, int64_t columns, int64_t width, int64_t offset) {
    for (int64_t done = 0; done < count;) {
        const int64_t row = (start + done) / columns, column = (start + done) % columns;
        const int64_t some = std::min(columns - column, count - done);
        std::memcpy(out + row * width + offset + column, numbers + done, some * sizeof(float));
        done += some;
    }
}

int gather_chunk(Meeting& meeting, const float* part, int64_t start, int64_t count, int64_t columns, float* out, Deadline& deadline) {
    if (meeting.rank) {
        if (int failure = begin_writing(meeting, deadline)) return failure;
        std::memcpy(meeting.slot(meeting.rank), part + start, count * sizeof(float));
        post(meeting);
        return MEETING_OK;
    }
    ++meeting.round;
    if (int failure = post_and_await(meeting, deadline)) return failure;
    for (int rank = 0; rank < meeting.size; ++rank) {
        const float* theirs = rank ? numbers<float>(meeting, rank, 0) : part + start;
        place(out, theirs, start, count, columns, columns * meeting.size, rank * columns);
    }
    return MEETING_OK;
}

int broadcast_chunk(Meeting& meeting, char* data, int64_t bytes, Deadline& deadline) {
    if (meeting.rank == 0) {
        if (int failure = begin_writing(meeting, deadline)) return failure;
        std::memcpy(meeting.slot(0), data, bytes);
        post(meeting);
        return MEETING_OK;
    }
    ++meeting.round;
    post(meeting);
    if (int failure = await(meeting, 0, meeting.round, deadline)) return failure;
    std::memcpy(data, meeting.slot(0), bytes);
    return MEETING_OK;
}

// Spinning helps only where the rank that is waited for can run meanwhile.
bool has_core_for_each(int size) {
    cpu_set_t cores;
    return sched_getaffinity(0, sizeof cores, &cores) != 0 || CPU_COUNT(&cores) >= size;
}

bool take_seat(Meeting& meeting) {
    uint32_t nobody = 0, size = static_cast<uint32_t>(meeting.size);
    if (!meeting.board->size.compare_exchange_strong(nobody, size) && nobody != size) {
        errno = EINVAL;
        return false;
    }
    struct flock range = byte_of(meeting.rank, F_WRLCK);
    if (fcntl(meeting.fd, F_SETLK, &range) != 0) return false;
    meeting.mine().taken.store(1);
    meeting.round = meeting.mine().posted.load();
    return true;
}

Meeting& at(void* meeting) { return *static_cast<Meeting*>(meeting); }

}  // namespace

size_t mmaas_meeting_bytes(int size) { return sizeof(Board) + size * (sizeof(Seat) + 2 * static_cast<size_t>(CHUNK)); }

void* mmaas_meeting_join(int fd, size_t bytes, int rank, int size) {
    struct stat found;
    if (size < 2 || size > MAX_RANKS || rank < 0 || rank >= size || bytes < mmaas_meeting_bytes(size)) {
        errno = EINVAL;
        return nullptr;
    }
    if (fstat(fd, &found) != 0) return nullptr;
    if (static_cast<size_t>(found.st_size) < bytes) {
        errno = EINVAL;
        return nullptr;
    }
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED) return nullptr;
    auto* board = static_cast<Board*>(memory);
    auto* seats = reinterpret_cast<Seat*>(board + 1);
    char* slots = reinterpret_cast<char*>(seats + size);
    auto* meeting = new Meeting{board, seats, slots, bytes, fd, rank, size, 0, has_core_for_each(size) ? SPIN_NS : 0};
    if (!take_seat(*meeting)) {
        const int why = errno;
        munmap(memory, bytes);
        delete meeting;
        errno = why;
        return nullptr;
    }
    return meeting;
}

int mmaas_meeting_all_reduce(void* meeting, float* data, int64_t count, double timeout_s) {
    return all_reduce(at(meeting), data, count, timeout_s);
}

int mmaas_meeting_all_reduce_bf16(void* meeting, uint16_t* data, int64_t count, double timeout_s) {
    return all_reduce(at(meeting), reinterpret_cast<BFloat16*>(data), count, timeout_s);
}

int mmaas_meeting_broadcast(void* meeting, void* data, int64_t bytes, double timeout_s) {
    if (int over = result(at(meeting))) return over;
    Deadline deadline(timeout_s);
    for (int64_t start = 0; start < bytes; start += CHUNK)
        if (int failure = broadcast_chunk(at(meeting), static_cast<char*>(data) + start, std::min(CHUNK, bytes - start), deadline))
            return failure;
    return MEETING_OK;
}

int mmaas_meeting_gather(void* meeting, const float* part, int64_t rows, int64_t columns, float* out, double timeout_s) {
    if (int over = result(at(meeting))) return over;
    Deadline deadline(timeout_s);
    const int64_t count = rows * columns, most = CHUNK / static_cast<int64_t>(sizeof(float));
    for (int64_t start = 0; start < count; start += most)
        if (int failure = gather_chunk(at(meeting), part, start, std::min(most, count - start), columns, out, deadline)) return failure;
    return MEETING_OK;
}

int mmaas_meeting_missing(void* meeting) {
    const uint32_t over = at(meeting).board->over.load();
    return over ? static_cast<int>(over >> 8) : -1;
}

uint32_t mmaas_meeting_round(const void* meeting) {
    const auto& asked = *static_cast<const Meeting*>(meeting);
    return asked.seats[asked.rank].posted.load();
}

void mmaas_meeting_leave(void* meeting) {
    Meeting& leaving = at(meeting);
    munmap(leaving.board, leaving.bytes);
    close(leaving.fd);
    delete &leaving;
}
