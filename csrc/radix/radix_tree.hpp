// The prefix cache: a radix tree over token ids, in steps of a page, that owns the KV pages its nodes name.
//
// The interface is described in src/minisgl/cache/base.py; src/minisgl/cache/reference.py is the same tree in Python,
// equal in every result down to node ids and the order of freed pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

namespace minisgl {

class RadixTree {
  public:
    using NodeId = std::int32_t;
    using Ids = std::span<const std::int32_t>;

    struct Match {
        NodeId node;
        std::size_t num_pages;
    };

    // Misuse throws std::invalid_argument: a page size below 1, a node that isn't in the tree, too few tokens for the
    // pages, an unlock without a lock.
    explicit RadixTree(std::int64_t page_size);

    std::size_t page_size() const { return page_size_; }
    std::size_t num_pages() const { return num_pages_; }
    std::size_t num_evictable_pages() const { return num_evictable_; }

    // The longest cached prefix of `tokens` in full pages; splits the node it ends in.
    Match match(Ids tokens);
    // The same length in pages, changing nothing.
    std::size_t match_length(Ids tokens) const;
    // Writes the pages on the path to `node`, first page first; `pages` has exactly the room they need.
    void copy_pages(NodeId node, std::span<std::int32_t> pages) const;
    // Adds the path of the first pages.size() * page_size tokens. Returns its node and the pages that were there.
    Match insert(Ids tokens, Ids pages);
    void lock(NodeId node);
    void unlock(NodeId node);
    // Frees the freed.size() least recently used pages (at most num_evictable_pages()) and writes their ids.
    void evict(std::span<std::int32_t> freed);
    // Empties the tree and writes all num_pages() ids, in order of node id.
    void reset(std::span<std::int32_t> freed);
    // Throws std::logic_error that names the first invariant found broken.
    void check_integrity() const;

  private:
    static constexpr NodeId kRoot = 0;
    static constexpr NodeId kNone = -1;
    static constexpr NodeId kUnused = -2;  // parent of an id that waits in free_ids_

    // A run of pages. The children of all nodes are found through one hash table keyed by (parent, first page), whose
    // chains run through the nodes (`next_in_bucket`). `older` and `newer` link the nodes without a lock in order of
    // use, in a ring that the root closes: root.newer is the least, root.older the most recently used.
    struct Node {
        std::vector<std::int32_t> tokens;
        std::vector<std::int32_t> pages;
        std::uint64_t hash = 0;
        NodeId next_in_bucket = kNone;
        NodeId parent = kUnused;
        NodeId older = kNone;  // kNone: not in the ring
        NodeId newer = kNone;
        std::int32_t num_children = 0;
        std::int32_t locks = 0;  // locks on this node and on all below
    };

    // Where a descent ends: `used` pages into `node`, `matched` pages below the root.
    struct Position {
        NodeId node;
        std::size_t used;
        std::size_t matched;
    };

    void clear();
    Position descend(Ids tokens) const;
    NodeId node_at(const Position& position);
    NodeId split(NodeId lower, std::size_t used);
    NodeId add(NodeId parent, Ids tokens, Ids pages, std::int32_t locks);
    void remove(NodeId leaf);
    void check_node(NodeId node) const;

    std::uint64_t hash_child(NodeId parent, Ids first_page) const;
    NodeId find_child(NodeId parent, Ids tokens) const;
    void link_child(NodeId child, NodeId parent);
    void unlink_child(NodeId child);
    NodeId& bucket(const Node& node) { return buckets_[node.hash & (buckets_.size() - 1)]; }
    void grow_buckets();

    void touch(NodeId node);
    void append_newest(NodeId node);
    void leave_ring(NodeId node);

    void check_links(NodeId id) const;
    void check_ring() const;
    void check_totals() const;

    std::size_t page_size_;
    std::size_t num_pages_ = 0;
    std::size_t num_evictable_ = 0;
    std::deque<Node> nodes_;  // by id; a deque, so that growth moves no node
    std::vector<NodeId> free_ids_;
    std::vector<NodeId> buckets_;  // a power of two of them
};

}  // namespace minisgl
